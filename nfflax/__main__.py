"""`python -m nfflax` is the `nfflax` command."""

import sys

from nfflax.cli import main

sys.exit(main())
