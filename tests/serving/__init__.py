"""Children served by real servers and asked over HTTP; ``make serve-test`` runs it, see ``__main__``."""
