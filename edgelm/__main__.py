"""``python -m edgelm``: the same as the ``edgelm`` command."""

from edgelm.cli.app import main

if __name__ == "__main__":
    main()
