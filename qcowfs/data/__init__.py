"""Guest bytes on their way: extents to buffers, buffers to clusters, zeros, what lies below.

Owns moving and copying them. Must not know headers, locks, or how anything was opened.
"""
