"""The delta on disk: manifest, codecs, reader, writer, digests."""
