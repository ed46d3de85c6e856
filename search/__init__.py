"""The search: candidate -> outcome -> ledger -> front -> report, tracking, export."""
