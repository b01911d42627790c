"""Reports: records of runs in; curves, findings and pictures out."""
