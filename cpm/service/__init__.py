"""What both daemons need from their surroundings: named tasks, the clock, the journal, readiness, configuration."""
