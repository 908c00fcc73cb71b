import sys

from foam_hf.cli import main

if __name__ == "__main__":
    sys.exit(main())
