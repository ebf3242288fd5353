"""The status page as HTML and SVG, from the values of :mod:`cpm.queries.site_views`. Pure; it serves nothing."""
