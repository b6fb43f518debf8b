"""The command line: `python -m flashmoe_cupy` and `flashmoe-cupy`.

Exit codes: 0 done, 1 the problem or the machine does not allow it, 2 wrong use. With --json every outcome is one JSON
document on standard output; an error has the fields `error` (its kind) and `message`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from flashmoe_cupy.errors import FlashMoEError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. --help and --version raise SystemExit(0), as argparse does."""
    from flashmoe_cupy import _env
    from flashmoe_cupy.cli import commands, options, show

    words = options.joined(sys.argv[1:] if argv is None else argv)
    ours = words[: words.index("--")] if "--" in words else words
    as_json = any(len(word) > 2 and "--json".startswith(word) for word in ours)  # argparse takes short forms too
    try:
        parser = options.make_parser()
        args = parser.parse_args(words)
        if args.command is None:
            parser.print_help()
            return 2
        try:
            _env.get()
        except ValueError as error:  # an environment variable with a wrong value
            raise options.Misuse(str(error)) from None
        return commands.COMMANDS[args.command](args)
    except (FlashMoEError, options.Misuse) as error:
        show.fail(error, as_json)
        return 2 if isinstance(error, options.Misuse) else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        sys.stderr.close()
        return 0
