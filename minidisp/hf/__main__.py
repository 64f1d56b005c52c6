import sys

from minidisp.hf import main

if __name__ == "__main__":
    sys.exit(main())
