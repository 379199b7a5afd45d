"""`python -m samoe_hf COMMAND`, as `samoe COMMAND`; for `torchrun -m` and `accelerate launch -m` too."""

from samoe_hf.cli import main

if __name__ == "__main__":
    main()
