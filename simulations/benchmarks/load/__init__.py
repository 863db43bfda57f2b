"""A deployed server under the load of many nodes that train nothing."""
