"""New images: their form, where everything in them lies, how they are encrypted, and writing them.

Must not know how an image is opened or filled.
"""
