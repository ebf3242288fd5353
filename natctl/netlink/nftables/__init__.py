"""Our nftables tables: operations to messages (:mod:`.encode`), and what the kernel lists to values (:mod:`.read`)."""
