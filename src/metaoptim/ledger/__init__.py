"""The ledger: what recipes were measured to reach, by whom it can be measured again, and the page that tells it."""
