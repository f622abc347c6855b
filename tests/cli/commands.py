"""What the tests of verbs do alike: run one, and read what a run wrote."""

import json

from jaxft import cli


def jaxft(capsys, *words):
    """(exit code, stdout, stderr) of one command."""
    code = cli.main([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err


def metrics(folder):
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
