"""Commands on data: what is wrong with it (check), how it looks to training (preview), and shards from folders and back (pack)."""
