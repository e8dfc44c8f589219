"""Commands for data: find problems (check), show samples as training sees them (preview), and pack shards (pack)."""
