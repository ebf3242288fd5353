"""
The live view of ``virt-ports top``.

====================  ===================================================================================
:mod:`.model`         what is known and how it is looked at; lists, reports and keys in, pure
:mod:`.drawing`       from the model to lines of styled text, pure
:mod:`.feed`          the threads that ask cpmd
:mod:`.terminal`      the loop between keys, feed and a terminal (curses)
====================  ===================================================================================
"""
