"""Whole disks copied, compared and measured, in threads.

Must not know the command line.
"""
