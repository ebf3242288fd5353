"""How cpmd serves: the decision loop, and what connects it with operators and nodes. Decides nothing by itself."""
