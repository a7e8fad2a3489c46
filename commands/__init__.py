"""The commands of ``longrope``. A verb parses, calls and prints; the noun beside it does the work above the rooms."""
