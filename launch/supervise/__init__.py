"""How runs start, are told to stop, end, and are kept from each other's folders."""
