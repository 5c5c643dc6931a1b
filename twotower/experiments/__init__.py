"""Common parts of the experiments: trials, rules and verdicts, suites, and the demo."""
