"""The test suite: `test_<module>.py` are unit and property tests, `e2e/` mounts real images."""
