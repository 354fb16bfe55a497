"""End-to-end tests: real FUSE mounts of images that QEMU's tools made and judge."""
