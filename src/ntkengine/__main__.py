"""`python -m ntkengine`."""

from ntkengine.cli import main

if __name__ == "__main__":
    main()
