"""Sources of audio and captions, and the build that turns them into token shards on disk."""
