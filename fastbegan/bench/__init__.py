"""Measuring: `fastbegan bench step`, `report` and `plan`, and what they share with the suites in the folder bench/."""
