"""``python -m layersmith``, which launchers such as ``torchrun`` start."""

from layersmith.cli import main

if __name__ == "__main__":
    main()
