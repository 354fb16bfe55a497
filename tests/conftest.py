"""Settings that every test shares."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("fixed", deadline=None, derandomize=True, max_examples=80)
settings.register_profile("explore", deadline=None, max_examples=5000, print_blob=True)
settings.load_profile("fixed")  # a run repeats exactly; --hypothesis-profile=explore looks further
