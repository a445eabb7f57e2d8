"""Where an iteration stands: a cursor that is told and asked, a digest of what came before, and a state to keep."""
