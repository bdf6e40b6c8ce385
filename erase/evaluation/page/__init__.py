"""The parts of a run's page, which `erase.evaluation.report` puts together."""
