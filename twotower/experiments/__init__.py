"""What experiments share: trials, rules and verdicts, suites, and the demo."""
