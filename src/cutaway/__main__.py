"""`python -m cutaway`: the same as the command `cutaway`."""

import sys

from cutaway.cli.main import main

sys.exit(main())
