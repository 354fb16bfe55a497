"""An image's tables and counts: in caches, as arrays, in a draft; and when they are written.

Owns every structure of an image but its header and the guest's data. Must not know how guest bytes move.
"""
