"""Transformations of cluster data, bytes to bytes: compression, later encryption.

Must not know files, offsets or the image. Each library is imported when its codec is first used.
"""
