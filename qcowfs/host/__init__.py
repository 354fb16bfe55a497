"""The host: files, their locks, what is sent to the disk early, threads.

Owns everything that touches a descriptor. Must not know qcow2.
"""
