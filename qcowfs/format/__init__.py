"""The on-disk structures of qcow2: bytes to frozen dataclasses and back.

Owns layout, limits and the checks a structure can make of itself. Must not know files, await or logging.
"""
