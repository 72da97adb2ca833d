"""What does ``python -m dtrain.launch`` do? The same as the ``dtrain`` command."""

from dtrain.launch.cli import main

if __name__ == "__main__":
    main()
