"""Make training data from text: a tokenizer and Megatron's indexed dataset.

    python scripts/prepare_data.py --stdlib --output data/quickstart --vocab-size 4096
    python scripts/prepare_data.py --input docs notes.txt --output data/mine --vocab-size 8192 --max-mib 500

A second run with the same files and settings finds the result and reuses it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", type=Path, metavar="PATH", help="files, and folders to search")
    source.add_argument("--stdlib", action="store_true", help="the Python standard library's own sources")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="directory to make")
    parser.add_argument(
        "--pattern",
        metavar="NAMES",
        help="names to take from folders, such as '*.py,*.md' (default: Python sources and, but for "
        "--stdlib, *.md, *.rst and *.txt)",
    )
    tokenizer = parser.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument("--vocab-size", type=int, metavar="N", help="train a tokenizer with N ids")
    tokenizer.add_argument("--tokenizer", type=Path, metavar="DIR", help="use this tokenizer instead")
    parser.add_argument("--max-mib", type=float, metavar="N", help="take at most N MiB of text")
    parser.add_argument(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end each document with the end-of-document token (default: yes)",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    # This process never forks, so the tokenizers library may use every core.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # Imported late: --help and a wrong option should not wait for torch.
    from bridge.training.data.errors import PrepareError
    from bridge.training.data.prepare import PrepareSettings, prepare
    from bridge.training.tokenizers import TokenizerError

    settings = PrepareSettings(
        output=options.output,
        inputs=tuple(options.input or ()),
        stdlib=options.stdlib,
        patterns=tuple(options.pattern.split(",")) if options.pattern else None,
        vocab_size=options.vocab_size,
        tokenizer=options.tokenizer,
        max_mib=options.max_mib,
        append_eod=options.append_eod,
    )
    try:
        result = prepare(settings, report=lambda line: print(line, flush=True))
    except (PrepareError, TokenizerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"dataset.path={result.dataset_path}")
    print(f"tokenizer.tokenizer_model={result.tokenizer_path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
