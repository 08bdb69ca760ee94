"""HTML pages that need no other file: their look (page.html.j2), their parts (parts.html.j2), and their rendering."""
