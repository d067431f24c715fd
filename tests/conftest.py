"""Hypothesis profiles: the sources are tested with the default one, in `make test` what is compiled with the quick one;
`HYPOTHESIS_PROFILE=nightly make test` runs the long one."""

import os

from hypothesis import Phase, settings

# No deadline: on a busy machine a slow example says nothing about the code.
settings.register_profile("default", deadline=None)
settings.register_profile("quick", deadline=None, max_examples=20)
# Of what fails nobody reads the example (dev/mutations).
settings.register_profile("unshrunk", deadline=None, database=None, phases=[Phase.explicit, Phase.generate])
settings.register_profile("nightly", deadline=None, max_examples=10_000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
