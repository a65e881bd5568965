"""Runs `fastreg compare`: trains a language model with several regularizers side by side.

command      the command line: reads the arguments, trains all, writes the results
contenders   the table of contenders; a new one is a row
choice       which contenders `--with` and `--recipe` ask for
setup        what a contender may change, and the optimizer made of it
text         model and text
runner       trains one contender with one seed
results      the record of a run, and the mean over seeds
verdicts     whether a contender helped
report       table on the terminal, and JSON
figure       the curves as PNG
resume       the file with which an interrupted comparison goes on
"""

from .command import add_parser

__all__ = ["add_parser"]
