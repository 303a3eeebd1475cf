"""Decides: front, scheduler, engine, supervisor, control. Imports `ipc` only, never torch."""
