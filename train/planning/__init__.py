"""Plans of training runs on devices that nobody holds; see docs/planning.md."""
