"""The networks of LTX-2 and LTX-2.3, one file each."""
