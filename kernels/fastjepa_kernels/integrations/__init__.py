"""The ops under the names and arguments of other JEPA codebases, and ways to put them there."""
