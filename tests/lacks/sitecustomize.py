"""For spawned workers: takes away what their parent lacks; see tests/lacking.py."""

import json
import os

if "SAEV_TORCH_TEST_LACKS" in os.environ:
    import lacking

    lacking.take_away(json.loads(os.environ["SAEV_TORCH_TEST_LACKS"]))
