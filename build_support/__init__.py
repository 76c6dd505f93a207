"""How lnl_ext is built: the PEP 517 backend, the toolchain it finds and the module it compiles."""
