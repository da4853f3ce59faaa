"""`python -m brainldm` is `brainldm`: the form that torchrun starts."""

from brainldm.cli import main

if __name__ == "__main__":
    main()
