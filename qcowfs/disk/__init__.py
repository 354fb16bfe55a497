"""An image opened as a disk: what it stands on, its keys, views, writing side and states.

Owns opening and the rules that hold for an image as a whole. Must not know FUSE or the command line.
"""
