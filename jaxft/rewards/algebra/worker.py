"""The process that compares: a JSON line [said, right] in, true or false out. Run as a file, apart from jaxft."""

import json
import logging
import resource
import sys

MEMORY = 4 << 30


def main() -> None:
    """Answers until there is nothing more to read."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    logging.disable(logging.WARNING)  # it tells that it has no time limit of its own, each time
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify

    # LaTeX alone: other expressions it would evaluate as Python
    latex = [LatexExtractionConfig(normalization_config=NormalizationConfig(units=True), boxed_match_priority=0)]
    for line in sys.stdin:
        said, right = (parse(rf"\boxed{{{text}}}", latex, parsing_timeout=0) for text in json.loads(line))
        print(json.dumps(bool(right) and verify(right, said, timeout_seconds=0)), flush=True)


if __name__ == "__main__":
    main()
